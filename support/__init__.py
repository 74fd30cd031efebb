"""The finished versions of what the notebooks build, one module for each idea."""
