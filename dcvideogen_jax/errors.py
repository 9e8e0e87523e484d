"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
  """A problem with the input, told in one sentence.

  The message says what was wrong, what was expected and what was found.
  Programs print it without a traceback and exit with code 2.
  """
