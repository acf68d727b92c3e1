"""What a step computes, on plain tensors, and the state that it computes with."""
