"""Flow matching for any model: noise levels, solvers, guidance, sampling."""
