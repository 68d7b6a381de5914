"""The method: masks, the masked autoencoder, the models it is compared with, encoders."""
