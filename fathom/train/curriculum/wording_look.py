"""Training wordings of tasks that look something up or count.

Written in the grammar language of `grammar.py`; first letters and final marks are added later.

Paper: none (wording of the training tasks).
"""

from __future__ import annotations

RULES = {
    "pls": "||||please |could you |can you |would you |kindly |I need you to |I want you to |"
    "I'd like you to |go and |now |",
    "tell": "<pls>[tell me|find|find out|look up|report|give me|say|get|get me|show me|check|"
    "determine|fetch|read out|let me know|return|extract]",
    "want": "[I need|I want|I'd like|I am looking for|we need|I have to know|I would like to know|"
    "need|I must know|looking for]",
    "in": "[in|in|in|inside|from|within|of|according to|listed in|given in]",
    "thefile": "[the file |the file |||||||file |||our file |the document |the text file |the log |"
    "the list |the table |the notes |that file ]",
    "f": "<thefile>{file}",
    "look": "<pls>[look|have a look|check|search|peek|go] [in|into|inside|through|at]",
    "open": "<pls>[open|read|look at|look into|check|inspect|see|view|load|cat|go through] <f>",
    "and": "[and|, then|, and then|, and| and then]",
    "somewhere": "[| somewhere| in this folder| in these files| in the files here| here|"
    " in the project| in one of the files| in the folder| among the files| in this directory]",
    "onefile": "[one of the files|some file here|a file in this folder|the files here|this folder|"
    "the files|one file|one of these files|the current folder|the project files]",
    "value": "[value|setting|configured value|current value|entry|value set]",
    "many": "[how many|how many|what number of|how much is the number of]",
    "count": "<pls>[count|count up|count all|tell me the number of|give me the number of|"
    "find the number of|report the number of|compute the number of|work out the number of|"
    "get the number of|determine the number of|tell me how many]",
    "total": "[sum|total|sum total|grand total|overall total]",
    "addup": "<pls>[add up|sum|sum up|total|add|total up|add together]",
    "biggest": "[largest|highest|biggest|maximum|greatest|top|max]",
    "least": "[smallest|lowest|minimum|least|min]",
    "column": "[column |the column |the |field |the field |values of |the values of |"
    "column named |]",
}

LOOK: dict[str, tuple[str, ...]] = {
    "setting": (
        "what is <the>[value of |setting for |value for |]{key} <in> <f>",
        "what['s|s] <the>{key} <in> <f>",
        "what is {key} set to in <f>",
        "what [value|setting] does {key} have in <f>",
        "what [value|setting] [has|does] <f> [for|give for|hold for|define for|set for] {key}",
        "which [value|setting] is [given|set|stored|configured|used|written] for {key} in <f>",
        "<tell> <the>[value of |<value> of |<value> for |]{key} <in> <f>",
        "<tell> what {key} is [set to |]in <f>",
        "<tell> what <f> says about {key}",
        "<open> <and> [tell me|report|give me|say|return|print] <the>[value of |]{key}",
        "<look> <f> for <the>{key}",
        "<look> <f> [for|and tell me|and find|and report] the <value> of {key}",
        "<want> <the>[value of |]{key} <in> <f>",
        "in <f>, what is <the>[value of |]{key}",
        "in <f>, what is {key} [set to|equal to]",
        "from <f>[,|] <tell> <the>[value of |]{key}",
        "{key} [in|from|of] <f>",
        "<f>: [what is |]{key}",
        "<f> [has|contains|holds|defines] [a setting|a value|an entry|a key] [called|named|for] "
        "{key}[. what is it|; what is its value|. tell me its value|. what is its value]",
        "how is {key} [set|configured|defined] in <f>",
        "{key} is [written|stored|defined|kept|listed] in <f>[. what is it|. look it up|; find "
        "its value|. read it out]",
        "[I forgot|I do not know|nobody knows|I am not sure about|tell me about] {key}[; |. ][it "
        "is in|look in|see] <f>",
        "[we have|there is] {key} in <f>[. what does it say|. which value|, with which value|. "
        "how is it set]",
    ),
    "setting_anywhere": (
        "what is <the>[value of |setting for |value for |]{key}<somewhere>",
        "what is {key} set to<somewhere>",
        "what value does {key} have<somewhere>",
        "<tell> <the>[value of |<value> of |<value> for |]{key}<somewhere>",
        "<tell> what {key} is set to<somewhere>",
        "<want> <the>[value of |]{key}. [it is|it's|it must be|it should be|it is set|"
        "it stands] [in|somewhere in|in one of] [the files|these files|the files here|this folder]",
        "<onefile> [has|contains|defines|sets|holds|gives] {key}[. what is it|. what is its value|"
        "; what is the value|. tell me the value|. find it]",
        "<look> [the files|these files|all files|this folder|everything here] for <the>{key} "
        "[and|, then] [tell me|report|give me] [its value|the value|what it is]",
        "[somewhere here|somewhere in this folder|in one of the files] {key} is [set|defined|given]"
        "[. what is it|. what is its value|; tell me its value|; find it]",
        "where is {key} [set|defined] [and|and to] what [is its value|value does it have]",
        "search [the files|the folder|everything|all files] for <the>{key}[| and give me the value"
        "| and tell me what it is]",
    ),
    "section": (
        "what is <the>[value of |]{key} [in|under|of] [the |]section {section} [in|of] <f>",
        "what is <the>[value of |]{key} [in|under|of] the {section} [section|block|part] "
        "[in|of] <f>",
        "what is {key} set to [in|under] [the |]{section} in <f>",
        "<tell> <the>[value of |<value> of |]{key} [in|under|of|from] [the |]section {section} "
        "[in|of|from] <f>",
        "<tell> <the>[value of |<value> of |]{key} [in|under|of|from|for] [the |]{section} "
        "[section |block |]<in> <f>",
        "<open> <and> [tell me|report|give me] <the>{key} [of|in|for|under] "
        "[section {section}|the {section} section|{section}]",
        "in <f>, what is <the>{key} [in|of|under|for] [section {section}|the {section} section"
        "|{section}]",
        "in [section {section}|the {section} section] of <f>, what is <the>[value of |]{key}",
        "<want> <the>{key} [of|for|under] [section {section}|the {section} section] <in> <f>",
        "{section} {key} in <f>",
        "which {key} does [section {section}|the section {section}|{section}] [have|use] in <f>",
        "<f> has [a section|a part|a block] {section}[. what is {key} there|. which value has "
        "{key} in it|. give me its {key}]",
        "[below|under|inside] {section} [in|of] <f>[ there is|, find|, look up|, read] {key}[. "
        "what is it|. tell me the value|]",
        "look at {section} in <f> <and> [tell me|report|give me] {key}",
        "[how is|what does it say for] {key} [in the part|in the block|below the title|in the "
        "group] {section} of <f>",
    ),
    "cell": (
        "what is the {column} of {row} <in> <f>",
        "what is the {column} for {row} <in> <f>",
        "what {column} does {row} have <in> <f>",
        "which {column} [does {row} have|is listed for {row}|belongs to {row}] in <f>",
        "<tell> the {column} [of|for] {row} <in> <f>",
        "<tell> the {column} [of|for] the {first} {row} <in> <f>",
        "<open> <and> [tell me|report|give me|find] the {column} [of|for] {row}",
        "<want> the {column} [of|for] {row} <in> <f>",
        "in <f>, what is the {column} [of|for] {row}",
        "<look> <f> for the {column} of {row}",
        "<f> is a table. what is the {column} [of|for|in the row of] {row}",
        "in the [table|CSV|list|sheet] {file}, what is the {column} [of|for] {row}",
        "{column} of {row} in <f>",
        "<tell> what <f> [lists|gives|says|has] as the {column} [of|for] {row}",
        "which {column} [is given|stands|appears|is written] [for|next to|beside] {row} in <f>",
        "[look up|find] {row} in <f>[. what is its {column}|. which {column} does it have|; give "
        "me the {column}]",
        "{row} is [listed in|one of the rows of|in] <f>[. what is its {column}|. tell me the "
        "{column}|; with which {column}]",
    ),
    "fact": (
        "what is the {attribute} [of|for] {subject} [according to|in|from|given in] <f>",
        "according to <f>, what is the {attribute} [of|for] {subject}",
        "<tell> the {attribute} [of|for] {subject} [in|from|given in|mentioned in] <f>",
        "<open> <and> [tell me|report|give me|find] the {attribute} [of|for] {subject}",
        "<want> the {attribute} [of|for] {subject}[,|;] [it is|it's|it stands|you find it] in <f>",
        "<f> [mentions|says|states|contains|gives] the {attribute} [of|for] {subject}"
        "[. what is it|. tell me|; what is it]",
        "which {attribute} [does {subject} have|belongs to {subject}|has {subject}] "
        "[according to|in] <f>",
        "in <f>, what is the {attribute} [of|for] {subject}",
        "<look> <f> for the {attribute} [of|for] {subject}",
        "<f>: {attribute} of {subject}",
        "<f> is about {subject}[, among others|]. [what is|which is|give me] the {attribute}",
        "[read|check] <f>: {subject} has which {attribute}",
        "{subject} has an {attribute}, see <f>[. what is it|. tell me|]",
    ),
    "fact_anywhere": (
        "what is the {attribute} [of|for] {subject}<somewhere>",
        "which {attribute} does {subject} have<somewhere>",
        "<tell> the {attribute} [of|for] {subject}<somewhere>",
        "<want> the {attribute} [of|for] {subject}. [it is|it's|it should be|it stands] "
        "[in|somewhere in|in one of] [the files|these files|the files here|this folder]",
        "<onefile> [mentions|says|states|contains|gives|has] the {attribute} [of|for] {subject}"
        "[. what is it|. find it|; tell me what it is]",
        "search [the files|the folder|everything|all files] for the {attribute} [of|for] {subject}",
        "[somewhere here|in one of the files] there is the {attribute} [of|for] {subject}"
        "[. what is it|; find it|. tell me]",
        "<look> [the files|these files|all files|this folder] for the {attribute} "
        "[of|for] {subject}",
    ),
    "log_value": (
        "what [{field} did {service} log|is the {field} of {service}] in <f>",
        "which {field} [did {service} report|does {service} have|is logged for {service}] in <f>",
        "<tell> the {field} [of|for|logged by|logged for|reported by] {service} <in> <f>",
        "<open> <and> [tell me|report|give me|find] the {field} [of|for|logged by] {service}",
        "in [the log |]{file}, what is the {field} [of|for] [the service |]{service}",
        "<want> the {field} [of|for] {service} from [the log |]{file}",
        "<look> [the log |]{file} for the {field} of {service}",
        "[the log |]{file} has a line [about|from|of] {service}[. what is its {field}|; what is "
        "the {field}|. tell me the {field}]",
        "{service} {field} in <f>",
        "{service} [wrote|left|reported|logged] [a|some|an] {field} in <f>[. which one|. what is "
        "it|; tell me]",
        "[find|look up] {service} in <f> <and> [tell me|report|give me] [the|its] {field}",
        "with which {field} [did|does] {service} [appear|show up|come up|run] in <f>",
    ),
    "topic": (
        "what is the {key} in the file [about|on|for|named after] {topic}",
        "there is a file [about|on|for|with notes on] {topic}[. what {key} does it give|"
        ". what is the {key} in it|; tell me the {key}|. which {key} does it hold]",
        "<tell> the {key} in the file [about|on|for|with notes on] {topic}",
        "<tell> the {key} from the {topic} [file|notes|document]",
        "what {key} does the {topic} [file|document|notes file] [hold|give|contain|have]",
        "<want> the {key} in the [file about {topic}|{topic} file]",
        "[find|look for] the file about {topic} <and> [tell me|report|give me] the {key}",
        "one of the files is about {topic}[. what is its {key}|. which {key} is in it|; "
        "what {key} does it hold]",
        "which {key} is in the [file about {topic}|{topic} file]",
        "[open|read|look into] the [file|notes|document] [about|on] {topic}[. what is the {key}|"
        ". which {key} is there|; tell me the {key}]",
        "[the notes|a note|a document|the text] on {topic} [must|should] [hold|give|have] a "
        "{key}[. what is it|; find it|]",
    ),
    "first_line": (
        "what is the first line of <f>",
        "<tell> the first line [of|in|from] <f>",
        "<tell> the [top|opening] line of <f>",
        "what does the first line of <f> say",
        "how does <f> [begin|start]",
        "<want> the first line of <f>",
        "<open> <and> [tell me|give me|print|show] [the|its] first line",
        "what [stands|is] [in|at] [the first line|the top|line 1] of <f>",
        "first line of <f>",
    ),
    "last_line": (
        "what is the last line of <f>",
        "<tell> the [last|final] line [of|in|from] <f>",
        "<tell> the bottom line of <f>",
        "what does the [last|final] line of <f> say",
        "how does <f> end",
        "<want> the [last|final] line of <f>",
        "<open> <and> [tell me|give me|print|show] [the|its] [last|final] line",
        "what [stands|is] [in the last line|at the end|at the bottom] of <f>",
        "last line of <f>",
    ),
    "nth_line": (
        "what is [line {n}|line number {n}|the {nth} line] of <f>",
        "<tell> [line {n}|line number {n}|the {nth} line] [of|in|from] <f>",
        "what does [line {n}|the {nth} line] of <f> say",
        "<want> [line {n}|the {nth} line] of <f>",
        "<open> <and> [tell me|give me|print|show] [line {n}|the {nth} line]",
        "what [stands|is] [in|on] [line {n}|the {nth} line] of <f>",
        "in <f>, what is [line {n}|the {nth} line]",
        "print [line {n}|the {nth} line] of <f>",
        "[line {n}|{nth} line] of <f>",
        "<open> <and> [read|quote] the line [number {n}|{n}]",
        "[of|among] the lines of <f>, [what is|give me|show me] the {nth}[| one]",
    ),
    "note": (
        "what is the {name} [in|from|given in|according to] <f>",
        "<tell> the {name} [in|from|given in|stated in] <f>",
        "<open> <and> [tell me|report|give me] the {name}",
        "<f> [has|contains|mentions|gives] [the|a] {name}[. what is it|. tell me|; what is it]",
        "in <f>, what is the {name}",
        "<want> the {name} [from|in] <f>",
        "<look> <f> for the {name}",
        "{name} in <f>",
        "[which|what] {name} [does <f> give|is in <f>|is given in <f>]",
    ),
    "note_anywhere": (
        "what is the {name}<somewhere>",
        "<tell> the {name}<somewhere>",
        "<onefile> [has|contains|mentions|gives|holds] [the|a] {name}[. what is it|. find it|"
        "; tell me what it is]",
        "<want> the {name}. [it is|it's|it must be|it stands] [in|somewhere in|in one of] "
        "[the files|these files|the files here|this folder]",
        "search [the files|the folder|everything|all files] for the {name}",
        "find the {name}[| hidden| written][ in one of the files| in these files| here|]",
        "<look> [the files|these files|all files|this folder] for the {name}",
    ),
    "show": (
        "<pls>[show|show me|print|display|cat|output|give me|read me|type out] "
        "[|the content of |the contents of |all of |the text of |the whole of ]<f>",
        "what [is|stands|is written] in <f>",
        "what does <f> [say|contain|hold]",
        "what [is the content|are the contents|is the text] of <f>",
        "<want> [the content|the contents|the text|to see the content] of <f>",
        "<pls>[open|read] <f> <and> [show me|print|give me] [its content|its text|everything|"
        "what it says]",
        "read <f>",
        "[let me see|I want to see|I would like to read] [all of |what is in |the whole |"
        "everything in |]<f>",
        "what [text|data] [is in|does one find in] <f>",
        "[put|bring] <f> on the screen",
    ),
    "which_file": (
        "which file [contains|has|mentions|holds|includes] [the text |the word |]{q}",
        "in which file [is|stands|does] {q}[| appear| occur]",
        "<tell> [which|what] file [contains|has|mentions|holds|includes] {q}",
        "<tell> the file that [contains|has|mentions|holds|includes] {q}",
        "<tell> the file with {q} in it",
        "where [is|does] {q}[| appear| occur| stand][| in these files]",
        "one file [contains|mentions|has] {q}[. which one|. which|. what is its name]",
        "search [the files|the folder|all files] for {q} <and> [tell me|name|report] the file",
        "what is the name of the file [that contains|that mentions|with|containing] {q}",
        "<want> the name of the file [that contains|with|containing|mentioning] {q}",
        "I [look|am looking|search] for the file [with|that has] {q}[. which is it|. what is it "
        "called|]",
        "{q} [is|stands|must be] in [one of the files|some file][. in which|. which one|; find it]",
    ),
    "lines": (
        "<many> lines [does <f> have|are in <f>|are there in <f>|has <f>|does <f> contain]",
        "<count> [the |]lines [in|of] <f>",
        "<count> [the |]lines <f> has",
        "what is the [number of lines|line count] [in|of] <f>",
        "<tell> the [line count|number of lines] of <f>",
        "<f>: how many lines",
        "how long is <f> in lines",
        "<want> the [line count|number of lines] of <f>",
        "line count of <f>",
        "how many lines [long is|are there altogether in|in total in] <f>",
        "<tell> the length of <f> in lines",
        "how many lines long is <f>",
        "<f> is how many lines long",
        "the length of <f>, [as a number of|measured in] lines",
        "<tell> how many lines <f> [takes|fills|consists of]",
    ),
    "words": (
        "<many> words [does <f> have|are in <f>|are there in <f>|has <f>|does <f> contain]",
        "<count> [the |]words [in|of] <f>",
        "<count> [the |]words <f> has",
        "what is the [number of words|word count] [in|of] <f>",
        "<tell> the [word count|number of words] of <f>",
        "<f>: how many words",
        "<want> the [word count|number of words] of <f>",
        "word count of <f>",
        "how many words [long is|are there altogether in|in total in] <f>",
        "<tell> the length of <f> in words",
        "how many words long is <f>",
        "<f> is how many words long",
        "how long is <f> in words",
        "the length of <f>, [as a number of|measured in] words",
        "<tell> how many words <f> [takes|consists of|is made of]",
    ),
    "characters": (
        "<many> [characters|bytes] [does <f> have|are in <f>|are there in <f>|has <f>]",
        "<count> [the |]<chars> [in|of] <f>",
        "<tell> the [size of <f> in bytes|number of <chars> of <f>|byte count of <f>]",
        "how [big|large|long] is <f> in <chars>",
        "what is the [size of <f> in bytes|number of <chars> in <f>]",
        "<f>: how many <chars>",
        "<want> the number of <chars> in <f>",
        "<tell> the length of <f> in <chars>",
        "how many <chars> long is <f>",
        "<f> is how many <chars> long",
        "the [length|size] of <f>, [as a number of|measured in] <chars>",
        "what is the byte [length|size] of <f>",
        "<tell> how many <chars> <f> [takes|fills|consists of|is made of]",
        "how much space does <f> take in <chars>",
        "<count> the <chars> <f> has",
    ),
    "matching": (
        "<many> lines [in|of] <f> [contain|mention|have|include] [the word |]{q}",
        "<count> [the |]lines [in|of] <f> [with|containing|that contain|that have|that mention|"
        "mentioning|which include] [the word |]{q}",
        "[in <f>, |]<many> lines [contain|mention|have] {q}[| in <f>]",
        "<many> [of the lines|lines] in <f> have {q} in them",
        "in how many lines of <f> [does {q} appear|does {q} occur|is {q}|do you find {q}]",
        "what is the number of lines [with|containing] {q} in <f>",
        "<count> the {needle} lines in <f>",
        "<many> {needle} [lines|entries] [are in <f>|are there in <f>|does <f> have]",
        "<want> the number of lines [with|containing] {q} in <f>",
        "<look> <f> <and> count the lines [with|containing] {q}",
        "<many> lines of <f> [speak of|refer to|are about|go with] {q}",
        "{q} is in how many lines of <f>",
        "<tell> [on|in] how many lines of <f> {q} [stands|is found|is written]",
    ),
    "occurrences": (
        "how [often|many times] does [the word |]{q} [occur|appear|stand|show up] in <f>",
        "how [often|many times] is [the word |]{q} in <f>",
        "<count> [the |]occurrences of {q} in <f>",
        "<count> times {q} [occurs|appears] in <f>",
        "<count> [all |]{q} in <f>, several in a line too",
        "<many> occurrences of {q} [are in <f>|are there in <f>|does <f> have]",
        "count how [often|many times] {q} [occurs|appears|is used] in <f>",
        "[in <f>, |]how often do you find {q}[| in <f>]",
        "how [frequent|common] is {q} in <f>",
        "<tell> the frequency of {q} in <f>",
        "<tell> how [often|frequently|many times] <f> [says|has|contains|repeats] {q}",
        "how frequently [is {q} used|does {q} come up|do you find {q}] in <f>",
        "<count> [every|each] [mention|use|appearance] of {q} in <f>[| one by one]",
        "{q} [is used|appears|comes up|stands] how [often|many times] in <f>",
    ),
    "extension": (
        "<many> [.{extension} files|{extension} files|files ending in .{extension}|files with "
        "the extension {extension}|*.{extension} files] [are there|are here|exist|are in this "
        "folder|do we have|are in the folder and its subfolders]",
        "<count> [the |][.{extension} files|{extension} files|files ending in .{extension}|files "
        "with the extension .{extension}|*.{extension} files][| here| in this folder| in total]",
        "what is the number of [.{extension} files|{extension} files][| here| in this folder]",
        "<tell> how many [.{extension} files|files end in .{extension}][| there are]",
        "<want> the number of [.{extension}|{extension}] files",
        "number of .{extension} files[| here| in this folder]",
        "[count|look for|find] [everything|all] [that ends in|ending with] .{extension}[. how "
        "many|; how many are there|]",
        "how many [of the files here|of all files|of our files] [are .{extension} files|end in "
        ".{extension}|have the extension {extension}]",
    ),
    "all_files": (
        "<many> files [are there|are here|are in this folder|do we have|exist here|are there in "
        "all|are in the working folder|are in this directory]",
        "<count> [the |all |]files[| here| in this folder| in total| in the current directory]",
        "what is the [total |]number of files[| here| in this folder]",
        "<want> the [total |]number of files[| here| in this folder]",
        "how many files in total [are there|do we have|are in this folder]",
        "count every file [here|in this folder|in this directory and below]",
        "<tell> how many files [there are|this folder has|you find][| here]",
        "how many files does this [folder|directory] [have|hold|contain]",
    ),
    "column_sum": (
        "what is the <total> of [column |the column |the |]{column} [in|of|from] <f>",
        "<addup> <column>{column} [in|of|from] <f>",
        "<addup> the {column} [column|values|numbers|field] [in|of|from] <f>",
        "<tell> the <total> of <column>{column} [in|of|from] <f>",
        "<tell> the total {column} [in|of|from] <f>",
        "what is the total {column} [in|of] <f>",
        "[compute|calculate|work out] the <total> of <column>{column} in <f>",
        "<open> <and> [add up|sum] [the|all] {column} [values|numbers|column]",
        "what do [the {column} values|the numbers in column {column}|all values of {column}] "
        "in <f> add up to",
        "in <f>, what is the <total> of <column>{column}",
        "<want> the <total> of <column>{column} [in|of] <f>",
        "how much is {column} in total in <f>",
        "[what comes out if you|what do you get when you] add [up |]all {column} [values|"
        "numbers] [in|of] <f>",
        "<tell> what all {column} [values|numbers] [in|of] <f> make together",
        "the {column} [numbers|values|figures] [in|of] <f>[, added up|, taken together|: what is "
        "their sum]",
    ),
    "column_max": (
        "what is the <biggest> [{column}|value of {column}|value in column {column}|{column} value]"
        " [in|of|from] <f>",
        "<tell> the <biggest> [{column}|value of {column}|value in column {column}|{column} value]"
        " [in|of|from] <f>",
        "in <f>, what is the <biggest> [{column}|{column} value]",
        "<open> <and> [tell me|report|give me] the <biggest> {column}",
        "<want> the <biggest> [{column}|value of {column}] [in|of] <f>",
        "how high does {column} go in <f>",
        "<biggest> {column} in <f>",
        "what is the <biggest> [number|figure|entry] [in|under|of] [column {column}|{column}|the "
        "field {column}] [of|in] <f>",
        "which [number|value|figure] [is the <biggest> one|is <biggest>] [in|under] {column} in "
        "<f>",
        "<tell> the <biggest> figure [for|of] {column} in <f>",
    ),
    "column_min": (
        "what is the <least> [{column}|value of {column}|value in column {column}|{column} value]"
        " [in|of|from] <f>",
        "<tell> the <least> [{column}|value of {column}|value in column {column}|{column} value]"
        " [in|of|from] <f>",
        "in <f>, what is the <least> [{column}|{column} value]",
        "<open> <and> [tell me|report|give me] the <least> {column}",
        "<want> the <least> [{column}|value of {column}] [in|of] <f>",
        "how low does {column} go in <f>",
        "<least> {column} in <f>",
        "what is the <least> [number|figure|entry] [in|under|of] [column {column}|{column}|the "
        "field {column}] [of|in] <f>",
        "which [number|value|figure] [is the <least> one|is <least>] [in|under] {column} in <f>",
        "<tell> the <least> figure [for|of] {column} in <f>",
    ),
    "unique_lines": (
        "<many> [different|distinct|unique] [lines|values|entries|items] "
        "[are in <f>|does <f> have|are there in <f>]",
        "<count> [the |][different|distinct|unique] [lines|values|entries|items] in <f>",
        "what is the number of [different|distinct|unique] [lines|values|entries|items] in <f>",
        "<open> <and> count the [different|distinct|unique] [lines|values|entries|items]",
        "without repeats, how many lines does <f> have",
        "leaving out duplicates, how many [lines|entries|items] are in <f>",
        "[how many|count the] [lines|entries|values] in <f>[, each one once|, without doubles|, "
        "ignoring repetitions|, every kind once]",
        "<tell> how many [different|distinct] [things|lines|kinds of line] <f> has",
    ),
    "column_unique": (
        "<many> [different|distinct|unique] [{column} values|values of {column}|values in column "
        "{column}|values does column {column} have] [are|are there|stand] in <f>",
        "<many> [different|distinct|unique] {column} [entries|values] does <f> have",
        "<count> [the |][different|distinct|unique] [{column} values|values of {column}|values of "
        "column {column}|values in the column {column}] in <f>",
        "what is the number of [different|distinct|unique] [{column} values|values of {column}] "
        "in <f>",
        "in <f>, how many [different|distinct|unique] values [does {column} have|has {column}]",
        "<open> <and> count the [different|distinct|unique] values of {column}",
        "how many [kinds of|different kinds of|distinct] {column} [are in|appear in|occur in] <f>",
        "[count|list and count] the {column} values of <f>[, each one once|, without doubles|, "
        "ignoring repetitions]",
    ),
    "filtered_sum": (
        "what is the <total> of {column} [where|for rows where|for the rows where] {by} is {wanted}"
        " in <f>",
        "in <f>, what is the <total> of <column>{column} [where|for all rows where] {by} is "
        "{wanted}",
        "<addup> <column>{column} [in|of|from] <f> [where|for rows where|for all rows where|but "
        "only where|only for rows where] [the |]{by} is {wanted}",
        "<tell> the [total|total of|sum of] {column} [in|from] <f> [where|for rows where|for all "
        "rows where] {by} is {wanted}",
        "<tell> the [total|total of|sum of] {column} for {by} {wanted} [in|from] <f>",
        "what is the total {column} [for|of] [{by} {wanted}|the {by} {wanted}] in <f>",
        "<want> the <total> of {column} in <f> for [{by} {wanted}|{by} = {wanted}]",
        "take the rows of <f> [where|in which] {by} is {wanted}[. what is the <total> of their "
        "{column}|; add up the {column}| and add up {column}]",
        "how much {column} [do|have] the {wanted} rows of <f> [have|got] [in total|together]",
        "looking only at {by} {wanted}, what is the <total> of {column} in <f>",
    ),
    "filtered_count": (
        "<many> rows [in|of] <f> have [the |]{by} {wanted}",
        "<many> rows [in|of] <f> [have {by} equal to {wanted}|have {wanted} as {by}|have {wanted} "
        "in column {by}]",
        "<count> [the |]rows [in|of] <f> [where|in which] [the |]{by} is {wanted}",
        "<count> [the |]rows with {by} {wanted} in <f>",
        "in <f>, <many> rows [have {by} {wanted}|have {wanted} as {by}]",
        "in how many rows of <f> is [the |]{by} {wanted}",
        "<many> [entries|records|rows] [with|where the] {by} [is |]{wanted} are [there |]in <f>",
        "take <f>[. how many|: how many|; how many] rows have {wanted} [in|under|as] {by}",
        "how many times does {wanted} stand as {by} in <f>",
        "<tell> how many rows of <f> [go with|belong to] {by} {wanted}",
    ),
    "numbers_sum": (
        "what is the <total> of [the |all |all the |]numbers in <f>",
        "<addup> [the |all |all the |]numbers in <f>",
        "<tell> the <total> of [the |all |all the |]numbers in <f>",
        "[compute|calculate|work out] the <total> of [the|all|all the] numbers in <f>",
        "what do the numbers in <f> add up to",
        "<open> <and> [add up|sum|sum up] [the|all|all the] numbers",
        "in <f>, what is the <total> of all [lines|numbers|values]",
        "<f> [has|holds|contains] [one number a line|a number in each line|a list of numbers]"
        "[. add them up|. what is their sum|. what is the total|; sum them up]",
        "what is the result of adding [all|up all|together all] numbers in <f>",
        "<tell> what the numbers [in|of] <f> make [together|in all]",
    ),
    "numbers_max": (
        "what is the <biggest> number in <f>",
        "<tell> the <biggest> [number|value] [in|of|from] <f>",
        "which number in <f> is the [largest|highest|biggest|greatest]",
        "<open> <and> [tell me|report|give me] the <biggest> number",
        "<f> [has|holds|contains] [one number a line|a number in each line|a list of numbers]"
        "[. which is the <biggest>|. what is the <biggest> one|; tell me the <biggest>]",
        "<biggest> number in <f>",
        "of all numbers in <f>, [which is|what is|give me] the <biggest>",
        "how high do the numbers in <f> go",
    ),
    "numbers_min": (
        "what is the <least> number in <f>",
        "<tell> the <least> [number|value] [in|of|from] <f>",
        "which number in <f> is the [smallest|lowest|least]",
        "<open> <and> [tell me|report|give me] the <least> number",
        "<f> [has|holds|contains] [one number a line|a number in each line|a list of numbers]"
        "[. which is the <least>|. what is the <least> one|; tell me the <least>]",
        "<least> number in <f>",
        "of all numbers in <f>, [which is|what is|give me] the <least>",
        "how low do the numbers in <f> go",
    ),
}
RULES["the"] = "|the "
RULES["chars"] = "[characters|bytes]"
