"""From a training step to Moments, and from Moments to a server."""
