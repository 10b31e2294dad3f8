"""Training data: datasets, loaders, samplers and epoch streams that pair inputs with soft targets by sample id."""
