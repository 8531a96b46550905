"""Router Knowledge Distillation."""
