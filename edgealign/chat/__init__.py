"""`edgealign chat`: a conversation with a model in the terminal, or through a pipe."""
