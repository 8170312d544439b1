"""Training on labels of any kind: the order of chunks, the loop, and what learners share."""
