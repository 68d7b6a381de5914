"""After training: export, features, probing, fine-tuning."""
