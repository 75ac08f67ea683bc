"""flowalign: align diffusion and flow image models against rewards, and measure whether it helped."""
