"""Settings of every stage: typed, documented, validated before any work starts."""
