"""Figures side by side with peers, as ratios of one run: `make bench-NAME`; results in `benchmarks/out/`."""
