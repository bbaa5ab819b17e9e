"""Update rules that use the variance of gradients."""
