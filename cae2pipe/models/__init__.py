"""The student: layers, encoder, regressor, decoders, masks, export."""
