"""What happens to a reward before it is compared with others."""
