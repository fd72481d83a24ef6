"""The parts of train_text.py beside its training loop."""
