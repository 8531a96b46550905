"""What an MoE is: layers, routers and fused experts."""
