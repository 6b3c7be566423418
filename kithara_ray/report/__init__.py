"""A run as one page: files of a run's directory to `report.html`. No Ray, no JAX."""
