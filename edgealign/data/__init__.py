"""Reading, checking and encoding of training data: conversations, pairs, thumbs, plain text."""
