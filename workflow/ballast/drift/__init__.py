"""How far a tuned model went from its base: what is measured, on which text, by which formula."""
