"""`cppass bench`: what is claimed of the pass, measured side by side in one run; ratios, never thresholds."""
