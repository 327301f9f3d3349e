"""Tensors of any model: nested structures, deferred weight gradients, host memory."""
