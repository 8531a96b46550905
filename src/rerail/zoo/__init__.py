"""Two small trained models that ship with the package, a matched pair: experiments/zoo/zoo.md."""
