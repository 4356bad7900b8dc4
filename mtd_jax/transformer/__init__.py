"""The decoder: layers, cache, rotary embedding, and the two walks over the layers."""
