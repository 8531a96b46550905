"""One file per stored form beyond whole experts; each imports torch and rerail.moe.bank only."""
