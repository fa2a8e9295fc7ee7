"""The ops: for each stem its reference, dispatch, autograd and public function."""
