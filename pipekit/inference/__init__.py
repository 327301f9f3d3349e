"""Export and text generation with trained models."""
