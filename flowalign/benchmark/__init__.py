"""Methods compared at equal compute: specification, cells that run apart, and a report."""
