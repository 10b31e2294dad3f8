"""Data sets with a loader: MNIST, and scikit-learn's small digits for machines where it is not available."""
