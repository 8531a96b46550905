"""What an MoE is: layers, routers and banks of experts. The only room that touches model attributes."""
