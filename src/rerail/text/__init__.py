"""Text: corpora, and the blocks of tokens that are cut from them."""
