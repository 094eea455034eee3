"""Fitting grids and masks: projections, k-means, quantizers, pruning, ranges, calibration."""
