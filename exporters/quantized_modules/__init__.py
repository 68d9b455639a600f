"""Modules of quantization libraries → plain torch modules and the quantizers that training left in them."""
