"""What was grown, on its way to the Hub: what of a folder goes there, in which bits, and with which card."""
