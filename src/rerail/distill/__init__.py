"""Router Knowledge Distillation: router rows learn to answer as the teacher did."""
