"""What all decoding methods share: state, loop, sampling, prompts, and the text around them."""
