"""What an MoE is: layers, routers and banks; the only room that touches model attributes."""
