"""How the attention of other libraries is recorded: a file a library. `dynattn.trace` imports them all."""
