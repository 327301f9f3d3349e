"""What is done with tensors whatever the model: nested structures, deferred weight gradients, freed memory."""
