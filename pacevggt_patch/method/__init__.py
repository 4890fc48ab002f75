"""The method, in the order it runs: functions of tensors that know no model and no file."""
