"""Build `report.html`, one page about a run, from the files of its directory. No Ray, no JAX."""
