"""Flow matching: noise levels, solvers, guidance, sampling; knows no model."""
