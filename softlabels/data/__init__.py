"""Which data sets come with a loader? MNIST, and scikit-learn's small digits for where it cannot be had."""
