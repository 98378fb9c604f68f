"""Compress: collapse what has converged. Quantizing, thinning, sparsifying and skipping by one budget."""
