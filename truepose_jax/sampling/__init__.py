"""From noise to pictures: guided DDIM in one jit, in-painting, and sheets of the results."""
