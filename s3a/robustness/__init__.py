"""How well trained models do on images unlike those that they were trained on."""
