"""maesil: from folders of CT to a pre-trained 3D masked autoencoder (arXiv 2604.00514)."""

__version__ = "0.1.0"
