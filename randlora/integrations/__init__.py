"""randlora inside other libraries, each of which is imported only when it is used."""
