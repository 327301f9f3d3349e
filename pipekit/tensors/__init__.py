"""Tensor tools for any model: nested structures, deferred weight gradients, host memory."""
