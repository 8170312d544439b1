"""The student: layers, encoder, regressor, masks, export."""
