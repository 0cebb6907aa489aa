"""Advice: which target, quantisation and adapter carrier fit a device, from measurements and the roofline."""
