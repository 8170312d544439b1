"""Training on labels of any kind: the order of chunks, the loop, and the base of learners."""
